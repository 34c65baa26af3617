"""The public names of `mlx_mobileclip`."""

from .embedding.pipeline import Embedded as Embedded
from .embedding.pipeline import iter_embeddings as iter_embeddings
from .embedding.pipeline import iter_text_embeddings as iter_text_embeddings
from .errors import CheckpointError as CheckpointError
from .errors import ConfigError as ConfigError
from .errors import DataError as DataError
from .errors import ImageError as ImageError
from .errors import ModelError as ModelError
from .errors import PromptError as PromptError
from .eval.metrics import Recall as Recall
from .eval.metrics import recall as recall
from .eval.metrics import top_k_accuracy as top_k_accuracy
from .eval.zero_shot import Prediction as Prediction
from .eval.zero_shot import build_zero_shot_classifier as build_zero_shot_classifier
from .eval.zero_shot import classify as classify
from .library.index import IndexSummary as IndexSummary
from .library.library import Library as Library
from .library.maintenance import Problem as Problem
from .library.match import Match as Match
from .library.results import SearchResults as SearchResults
from .loader import load as load
from .models.clip import MobileCLIP as MobileCLIP
from .models.clip import MobileCLIPConfig as MobileCLIPConfig
from .models.clip import PreprocessConfig as PreprocessConfig
from .preprocess.processor import Processor as Processor
from .quantization import Quantization as Quantization
