"""From the configuration of speculative decoding to the object that does it."""

from __future__ import annotations

from collections.abc import Callable

from inferflux_core.engine import verify_cost
from inferflux_core.engine.engine_spec import EngineSpec
from inferflux_core.engine.speculation import Speculation
from inferflux_core.errors import ConfigError, ModelFileError
from inferflux_core.interfaces import Backend, DraftModel, ModelRunner, Proposer, ProposerContext, Tokenizer
from inferflux_core.plugins import PluginRegistry


def make_speculation(
    spec: EngineSpec, registry: PluginRegistry, runner: ModelRunner, tokenizer: Callable[[], Tokenizer]
) -> Speculation | None:
    """The configured speculation around a runner that is warm; None if there is none.

    Raises:
        PluginError: the proposer is unknown, has bad settings or cannot be made.
        ModelFileError: the model cannot verify drafts, or the draft model cannot be loaded.
    """
    speculative = spec.speculative
    if speculative.method is None:
        return None
    max_draft = min(speculative.num_speculative_tokens, runner.caps.max_draft)
    if not max_draft or not runner.kv_cache_spec.can_trim:
        raise ModelFileError(
            f"model {spec.files.ref!r} cannot verify drafts, because its cache cannot forget the end of a sequence; set "
            f"speculative.method of this model to null"
        )

    def load_draft() -> DraftModel:
        draft = speculative.draft
        if draft is None:
            raise ConfigError(f"speculative.method {speculative.method!r} needs a draft model; set speculative.model")
        backend: Backend = registry.create("backend", draft.backend, draft.backend_settings)
        drafting = backend.runner(draft.files, spec.config)
        try:
            drafting.warm_up()
            return DraftModel(name=draft.files.ref, runner=drafting, tokenizer=backend.tokenizer(draft.files))
        except BaseException:
            drafting.close()
            raise

    context = ProposerContext(
        target=spec.files.ref, config=spec.config, model_info=runner.model_info, tokenizer=tokenizer, load_draft=load_draft
    )
    proposer: Proposer = registry.create("proposer", speculative.method, speculative.settings, context)
    try:
        return Speculation(proposer, verify_cost.measure(runner, max_draft), max_draft)
    except BaseException:
        proposer.close()
        raise
