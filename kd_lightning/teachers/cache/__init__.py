"""Teacher outputs, stored once and read by any number of trainings.

Shards are safetensors files rather than Arrow: the header has each tensor's dtype (bfloat16 too) and shape, tensors are
memory-mapped without a copy, and opening a file runs no code. Teacher outputs are plain numbers in bulk, for which
Arrow's columns and schemas have no use.

* `outputs`: which outputs are stored, and their encoding
* `manifest`: what a cache holds, from which teacher, in which files
* `shards`: one file, written once, checked, mapped
* `places`: where each example's outputs are, and copying them into a batch
* `upkeep`: locks, checks, and cleaning up after killed processes
* `store`: `TeacherCache`, the class for all of this
* `reuse`: copying what other caches hold for the same inputs
* `fill`: running a teacher on the missing examples
"""
