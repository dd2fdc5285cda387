"""The report: one self-contained HTML page made from a run's files.

`contents` reads the files, `charts` draws, `gallery` chooses examples, `page` puts them together.
"""
