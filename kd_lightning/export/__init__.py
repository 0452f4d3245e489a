"""Export of a student to files that run without teacher, Lightning or this package.

`plan` checks the request. `export` writes to a hidden folder, compares what it wrote with the student on the
validation split, and moves it into place. The formats are in `formats/`, one file each.
"""
