"""Every error that this package raises on purpose.

    GenretError
    ├── CorpusError                 what was given as images cannot be used
    │   ├── MetadataError           a line of metadata.jsonl / .csv is broken; names file and line
    │   ├── ImageError              a file is missing, is no image, or does not decode
    │   ├── UnsafePath              a file name leaves the folder
    │   ├── DuplicateImage          two records carry one image_id
    │   └── UnknownImage            an index has no image of that id
    ├── IdentifierError             identifiers cannot be made, or cannot form a trie
    │   └── IdentifierCollision     two images share an identifier, or one is the beginning of another
    ├── QueryError                  the query is empty or longer than the model reads
    ├── FilterError                 a metadata filter names no known key or cannot be parsed
    ├── SearchError                 a search was asked for something impossible
    │   ├── DeadEnd                 a finished identifier was asked for its next token
    │   └── NotANumber              a model answered NaN or +inf
    ├── StoreError                  an index folder is missing, damaged or of another version
    │   ├── IndexNotFound
    │   ├── IndexExists             a folder is not free for a new index
    │   ├── IndexDamaged            a checksum or a length differs; names the file
    │   ├── IndexVersionError       written by another format version
    │   ├── IndexBusy               another process is writing it
    │   ├── IndexChanged            another process has changed it since it was read
    │   └── ModelMismatch           model or tokenizer are not those the index was made with
    ├── NotWritten                  a disk is full, broken or read only; what was there is as it was
    ├── ModelError                  a model folder cannot be loaded or used
    │   └── NotTrained              the index has no trained weights yet
    ├── BatchError                  what a long run writes cannot be written, or its unfinished run is another
    ├── TrainingError               training cannot start or cannot go on
    ├── ServerError                 a vLLM server answered with an error or with nonsense
    │   └── ServerUnreachable       nothing answers at the address
    └── MissingExtra                an optional package is not installed (also an ImportError)

And one warning, `PictureNotShown`: a model that was to look at pictures is given text.

All carry the whole situation in their message: what is wrong, with which values, and what to do.
Knows nothing of the other modules.
"""


class GenretError(Exception):
    """Base of all errors of this package."""


class CorpusError(GenretError):
    """What was given as images cannot be used."""


class MetadataError(CorpusError):
    """A line of a metadata file is broken."""


class ImageError(CorpusError):
    """A file is missing, is no image, or does not decode."""


class UnsafePath(CorpusError):
    """A file name leaves the image folder."""


class DuplicateImage(CorpusError):
    """Two records carry one image_id."""


class UnknownImage(CorpusError):
    """An index has no image of that id."""


class IdentifierError(GenretError):
    """Identifiers cannot be made, or cannot form a trie."""


class IdentifierCollision(IdentifierError):
    """Two images share an identifier, or one identifier is the beginning of another."""


class QueryError(GenretError):
    """A query is empty or longer than the model reads."""


class FilterError(GenretError):
    """A metadata filter names no known key or cannot be parsed."""


class SearchError(GenretError):
    """A search was asked for something impossible."""


class DeadEnd(SearchError):
    """A finished identifier was asked for its next token."""


class NotANumber(SearchError):
    """A model answered NaN or +inf: its weights are damaged, or its dtype overflows."""


class StoreError(GenretError):
    """An index folder is missing, damaged or of another version."""


class IndexNotFound(StoreError):
    """There is no index in the folder."""


class IndexExists(StoreError):
    """A folder is not free for a new index."""


class IndexDamaged(StoreError):
    """A file of the index is missing, or differs from its recorded checksum."""


class IndexVersionError(StoreError):
    """The index was written by another format version."""


class IndexBusy(StoreError):
    """Another process is writing the index."""


class IndexChanged(StoreError):
    """Another process has changed the index since it was read."""


class ModelMismatch(StoreError):
    """Model or tokenizer are not those the index was made with."""


class NotWritten(GenretError):
    """A disk is full, broken or read only. What was there is as it was."""


class ModelError(GenretError):
    """A model folder cannot be loaded or used."""


class NotTrained(ModelError):
    """The index has no trained weights yet."""


class BatchError(GenretError):
    """What a long run writes cannot be written, or its unfinished run is another."""


class TrainingError(GenretError):
    """Training cannot start or cannot go on."""


class ServerError(GenretError):
    """A vLLM server answered with an error or with nonsense."""


class ServerUnreachable(ServerError):
    """Nothing answers at the server's address."""


class MissingExtra(GenretError, ImportError):
    """An optional package is not installed; names the extra that brings it."""


class PictureNotShown(UserWarning):
    """Recalled images go through an engine that shows its model no picture."""
