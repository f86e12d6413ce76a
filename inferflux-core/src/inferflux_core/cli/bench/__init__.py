"""`inferflux bench`: the same load on one or more OpenAI-compatible servers, in alternation, and what it showed.

`command` is the click command, `workloads` the prompts, `connection` one HTTP connection, `client` the load generator,
`figures` what is measured, `report` what is printed.
"""
