"""The public names of `mlx_fastvlm`."""

from mlx_mobileclip.errors import CheckpointError as CheckpointError
from mlx_mobileclip.errors import ConfigError as ConfigError
from mlx_mobileclip.errors import ImageError as ImageError
from mlx_mobileclip.errors import ModelError as ModelError
from mlx_mobileclip.errors import PromptError as PromptError
from mlx_mobileclip.quantization import Quantization as Quantization

from .generation.answer import Chunk as Chunk
from .generation.answer import Result as Result
from .generation.answer import Stats as Stats
from .generation.batch import BatchGenerator as BatchGenerator
from .generation.batch import generate_batch as generate_batch
from .generation.image_cache import ImageCache as ImageCache
from .generation.prompt_cache import PromptCache as PromptCache
from .generation.request import Request as Request
from .generation.stream import generate as generate
from .generation.stream import stream_generate as stream_generate
from .loader import load as load
from .models.fastvlm import FastVLM as FastVLM
from .preprocess.processor import Inputs as Inputs
from .preprocess.processor import Processor as Processor
