"""`python -m inferflux_core.cli.bench`: the command without the rest of the CLI."""

from inferflux_core.cli.bench.command import bench

bench(prog_name="inferflux bench")
