"""From a run folder to files that are deployed: without teacher, Lightning or this package, and proven to answer alike.

`plan` checks, `export` writes to a folder that nobody sees, holds what it wrote against the student on the validation
split, and moves it into place. The formats are in `formats/`, one file each.
"""
