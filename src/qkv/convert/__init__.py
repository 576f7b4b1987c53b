"""Conversion of multi-head checkpoints to grouped-query or multi-query attention.

Pooling heads changes what a model computes, so the result needs further training ("uptraining"): Ainslie et al. 2023,
section 2.1, use 5% of the original steps.
"""

from qkv.convert.checkpoint import CheckpointPlan as CheckpointPlan
from qkv.convert.checkpoint import convert_checkpoint as convert_checkpoint
from qkv.convert.checkpoint import plan_checkpoint as plan_checkpoint
from qkv.convert.checkpoint import plan_latent_checkpoint as plan_latent_checkpoint
from qkv.convert.checkpoint import write_checkpoint as write_checkpoint
from qkv.convert.divergence import Divergence as Divergence
from qkv.convert.divergence import measure_divergence as measure_divergence
from qkv.convert.errors import CheckpointError as CheckpointError
from qkv.convert.families.agreement import LayerAgreement as LayerAgreement
from qkv.convert.families.agreement import agreement_by_layer as agreement_by_layer
from qkv.convert.heads.alignment import Alignment as Alignment
from qkv.convert.heads.alignment import HeadAgreement as HeadAgreement
from qkv.convert.heads.alignment import KeySymmetry as KeySymmetry
from qkv.convert.heads.alignment import Projections as Projections
from qkv.convert.heads.alignment import align_heads as align_heads
from qkv.convert.heads.alignment import head_agreement as head_agreement
from qkv.convert.heads.pooling import group_heads as group_heads
from qkv.convert.heads.pooling import pool_heads as pool_heads
from qkv.convert.inspect.checkpoint import inspect_checkpoint as inspect_checkpoint
from qkv.convert.inspect.inspection import Inspection as Inspection
from qkv.convert.latent import convert_to_latent as convert_to_latent
from qkv.convert.layer import convert_layer as convert_layer
from qkv.convert.pruning import prune_heads as prune_heads
from qkv.convert.pruning import prune_state_dict as prune_state_dict
from qkv.convert.state import convert_state_dict as convert_state_dict

__all__ = [
    "Alignment",
    "CheckpointError",
    "CheckpointPlan",
    "Divergence",
    "HeadAgreement",
    "Inspection",
    "KeySymmetry",
    "LayerAgreement",
    "Projections",
    "agreement_by_layer",
    "align_heads",
    "convert_checkpoint",
    "convert_layer",
    "convert_state_dict",
    "convert_to_latent",
    "group_heads",
    "head_agreement",
    "inspect_checkpoint",
    "measure_divergence",
    "plan_checkpoint",
    "plan_latent_checkpoint",
    "pool_heads",
    "prune_heads",
    "prune_state_dict",
    "write_checkpoint",
]
