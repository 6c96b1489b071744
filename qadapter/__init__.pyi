"""The public names of the library: `__init__.py` loads them as these lines say, and type checkers read them."""

from qadapter.errors import QAdapterError as QAdapterError
from qadapter.evaluation.preference import preference_metrics as preference_metrics
from qadapter.evaluation.preference import score_pairs as score_pairs
from qadapter.inference.generate import generate_replies as generate_replies
from qadapter.policy.dial import Dial as Dial
from qadapter.policy.loading import load_base as load_base
from qadapter.policy.loading import load_policy as load_policy
from qadapter.policy.model import QAdapterForCausalLM as QAdapterForCausalLM
from qadapter.policy.objective import Objective as Objective
from qadapter.preferences.pair import PreferencePair as PreferencePair
from qadapter.preferences.pair import load_pairs as load_pairs
from qadapter.training.config import QAdapterConfig as QAdapterConfig
from qadapter.training.trainer import QAdapterTrainer as QAdapterTrainer

__version__: str
