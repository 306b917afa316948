"""A model folder: what is read of it, what is written, and what lies beside the weights.

`reading` opens the files, `config` and `names` hold them against the model that transformers makes of them,
`companions` and `card` are what lies beside, `output` and `lock` guard the folder to be written.
"""

from secateurs.checkpoint.companions import companions, copy_companions
from secateurs.checkpoint.hub import resolve
from secateurs.checkpoint.lock import output_lock
from secateurs.checkpoint.output import RECORD, check_output, check_place, new_folder
from secateurs.checkpoint.reading import INDEX, SINGLE, Checkpoint
from secateurs.checkpoint.writing import as_object, copy_file, read_json, write_json, write_tensors

__all__ = [
    "INDEX",
    "RECORD",
    "SINGLE",
    "Checkpoint",
    "as_object",
    "check_output",
    "check_place",
    "companions",
    "copy_companions",
    "copy_file",
    "new_folder",
    "output_lock",
    "read_json",
    "resolve",
    "write_json",
    "write_tensors",
]
