"""The audit log: who did what, one JSON object a line, each chained to the one before by a keyed hash.

events.py       what is recorded, and what values may look like
chain.py        the line, its canonical form and its hash
trail.py        AuditTrail: what the server calls
log.py          AuditLog, and NoAudit where there is none
writer.py       the thread that owns the files
append_file.py  one file that is only appended to, and repaired after a failed write
rotation.py     names of closed files, and the manifest of them
recovery.py     where the chain stands when the server starts
checkpoints.py  signed statements of how far the log had come
key_files.py    the secrets of both, created at the first start
content.py      what is kept of prompts
reader.py       reads a log that may be written and rotated meanwhile
verify.py       says whether a log is whole

Guarantee: a record that is in the log cannot be changed, removed from the middle, inserted or moved without the key and
stay unnoticed. What is cut off the end is noticed with the checkpoints, up to the newest of them. What a crash can lose:

fsync       the process is killed                    the machine loses power
each        no record whose `record()` returned      the same
interval    those still in the queue                 those of the last 100 ms as well
never       those still in the queue                 what the system had not written, usually up to 30 s

The queue is short while the disk keeps up, and never longer than `queue_size`.
"""
