"""Spoils model folders in seeded ways and judges what readers make of them; for formats of plug-ins too.

`folders` makes small valid folders of every kind, `mutations` spoils them, `verdicts` says whether a reader did right, and
`worker` runs cases in a process of its own with a limit on memory and time.
"""
