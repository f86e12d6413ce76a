"""`inferflux bench`: the same load on one or more OpenAI-compatible servers, in alternation, and what it showed.

`command` is the click command, `workloads` the load and `prompts` its texts, `connection` one HTTP connection, `client` the
load generator, `inquiry` what else a server is asked, `figures` what is measured, `report` what is printed.
"""
