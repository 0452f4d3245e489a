"""A teacher's answers, stored once and read by any number of trainings.

Shards are safetensors files rather than Arrow: their header says each tensor's dtype (bfloat16 too) and shape, they are
mapped into tensors without a copy, and safetensors is a dependency anyway. Opening one runs no code and parses no
record batches, and the answers are nothing but numbers in bulk, for which Arrow's columns and schemas have no use.

* `outputs`: what of an answer is stored, and how it becomes tensors of a file and an answer again
* `manifest`: what a cache answers, with what, and which files hold it
* `shards`: one file, written once, checked, mapped
* `places`: where each example's answer lies, and the copy from there into a batch
* `upkeep`: the lock, the checks, what killed processes left
* `store`: `TeacherCache`, which all of this serves
* `fill`: having a teacher answer what is missing
* `command`: `kd-cache`
"""
