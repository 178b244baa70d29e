"""Foreign files are hostile: every reader of the package against truncated, bit-flipped and crafted ones.

samples.py          one small valid file of every kind
mutations.py        random damage to bytes, archive entries, JSON and nested content
crafted*.py         attacks that somebody thought of
hostile.py          both, written as files for a reader
reader.py           what a reader is
readers.py          every reader of the package
isolation.py        one process a case, with limits on memory and time, and what it did
campaign.py         many cases, and the counts (benchmarks/fuzz.py)
"""
