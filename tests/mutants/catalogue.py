"""All mutants, by what they break."""

from mutants_of_experts import EXPERTS
from mutants_of_gradients import GRADIENTS
from mutants_of_inference import INFERENCE
from mutants_of_layers import LAYERS
from mutants_of_resume import RESUME

MUTANTS = (*LAYERS, *GRADIENTS, *RESUME, *EXPERTS, *INFERENCE)
