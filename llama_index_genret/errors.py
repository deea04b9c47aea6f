"""Every error that this package raises on purpose.

    GenretError
    ├── CorpusError                 the given images cannot be used
    │   ├── MetadataError           a line of metadata.jsonl / .csv is broken; the message gives file and line
    │   ├── ImageError              a file is missing, is not an image, or does not decode
    │   ├── UnsafePath              a file name leaves the folder
    │   ├── DuplicateImage          two records have the same image_id
    │   └── UnknownImage            the index has no image with this id
    ├── IdentifierError             identifiers cannot be made, or cannot form a trie
    │   └── IdentifierCollision     two images share an identifier, or one is a prefix of another
    ├── QueryError                  the query is empty or longer than the model reads
    ├── FilterError                 a metadata filter has an unknown key or cannot be parsed
    ├── SearchError                 the request for a search is impossible
    │   ├── DeadEnd                 a finished identifier has no next token
    │   └── NotANumber              a model returned NaN or +inf
    ├── StoreError                  an index folder is missing, damaged or of another version
    │   ├── IndexNotFound
    │   ├── IndexExists             the folder for a new index is not free
    │   ├── IndexDamaged            a checksum or a length differs; the message gives the file
    │   ├── IndexVersionError       another format version wrote the index
    │   ├── IndexBusy               another process is writing the index
    │   ├── IndexChanged            another process has changed the index since it was read
    │   └── ModelMismatch           the model or tokenizer differs from the one that the index was made with
    ├── NotWritten                  a disk is full, broken or read-only; the earlier content is intact
    ├── ModelError                  a model folder cannot be loaded or used
    │   └── NotTrained              the index has no trained weights yet
    ├── EncoderError                the encoder differs from the index's, or returns no finite vectors
    │   └── EncoderUnavailable      the encoder does not load, or its server does not respond
    ├── BatchError                  a long run cannot write its output, or the unfinished output is of another run
    ├── TrainingError               training cannot start or cannot continue
    ├── ServerError                 a vLLM server returned an error or an invalid response
    │   └── ServerUnreachable       no server responds at the address
    └── MissingExtra                an optional package is not installed (also an ImportError)

One warning: `ImageNotShown`, when a model that should see images receives only text.

Every message tells what is wrong, with which values, and how to fix it.
Independent of all other modules.
"""


class GenretError(Exception):
    """Base class of all errors of this package."""


class CorpusError(GenretError):
    """The given images cannot be used."""


class MetadataError(CorpusError):
    """A line of a metadata file is broken."""


class ImageError(CorpusError):
    """A file is missing, is not an image, or does not decode."""


class UnsafePath(CorpusError):
    """A file name leaves the image folder."""


class DuplicateImage(CorpusError):
    """Two records have the same image_id."""


class UnknownImage(CorpusError):
    """The index has no image with this id."""


class IdentifierError(GenretError):
    """Identifiers cannot be made, or cannot form a trie."""


class IdentifierCollision(IdentifierError):
    """Two images share an identifier, or one identifier is a prefix of another."""


class QueryError(GenretError):
    """A query is empty or longer than the model reads."""


class FilterError(GenretError):
    """A metadata filter has an unknown key or cannot be parsed."""


class SearchError(GenretError):
    """The request for a search is impossible."""


class DeadEnd(SearchError):
    """A finished identifier has no next token."""


class NotANumber(SearchError):
    """A model returned NaN or +inf: its weights are damaged, or its dtype overflows."""


class StoreError(GenretError):
    """An index folder is missing, damaged or of another version."""


class IndexNotFound(StoreError):
    """There is no index in the folder."""


class IndexExists(StoreError):
    """The folder for a new index is not free."""


class IndexDamaged(StoreError):
    """A file of the index is missing, or differs from its recorded checksum."""


class IndexVersionError(StoreError):
    """Another format version wrote the index."""


class IndexBusy(StoreError):
    """Another process is writing the index."""


class IndexChanged(StoreError):
    """Another process has changed the index since it was read."""


class ModelMismatch(StoreError):
    """The model or tokenizer differs from the one that the index was made with."""


class NotWritten(GenretError):
    """A disk is full, broken or read-only. The earlier content is intact."""


class ModelError(GenretError):
    """A model folder cannot be loaded or used."""


class NotTrained(ModelError):
    """The index has no trained weights yet."""


class EncoderError(GenretError):
    """The encoder is not the one of the index, or it returns something other than finite vectors."""


class EncoderUnavailable(EncoderError):
    """The encoder does not load, or its server does not answer."""


class BatchError(GenretError):
    """A long run cannot write its output, or the unfinished output is of another run."""


class TrainingError(GenretError):
    """Training cannot start or cannot continue."""


class ServerError(GenretError):
    """A vLLM server returned an error or an invalid response."""


class ServerUnreachable(ServerError):
    """No server responds at the address."""


class MissingExtra(GenretError, ImportError):
    """An optional package is not installed. The message names the extra that installs it."""


class ImageNotShown(UserWarning):
    """A LlamaIndex engine passes only the text of the recalled images to its model."""
