"""Row formats: a row of a file -> a conversation, a document, a pair of answers or a judged answer.

Contents are kept as they are, white space included. Keys of a row that its format does not know are ignored; keys of a
message are not, because what they usually say would change what is trained.
"""

from finetune.data.formats.kto_pairs import Pairing, pairs
from finetune.data.formats.recognise import Recognition, recognise
from finetune.data.formats.row_reader import FORMATS, Format, Reader, reader

__all__ = ["FORMATS", "Format", "Pairing", "Reader", "Recognition", "pairs", "reader", "recognise"]
