"""The check of a machine with a GPU: `make gpu`, or `python -m benchmarks.gpu` with only torch and transformers.

Sections run in order of risk, each in a process of its own with a time limit (`supervisor`). They append what they find
to a JSON-lines file as they find it (`results`). docs/gpu.md says what each check means.
"""
