"""Row formats: a row of a file -> a conversation, a document, a pair of answers or a judged answer.

Contents are kept as they are, white space included. Keys of a row that its format does not know are ignored; keys of a
message are not, because what they usually say would change what is trained.
"""

from finetune.data.formats.kto_pairs import pairs
from finetune.data.formats.recognise import SAMPLE_ROWS, recognise
from finetune.data.formats.row_reader import FORMATS, Reader, reader

__all__ = ["FORMATS", "SAMPLE_ROWS", "Reader", "pairs", "reader", "recognise"]
