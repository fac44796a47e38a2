"""Token mixers behind one interface (`msa_jax.attention.mixer`)."""

from flax import nnx

from msa_jax.attention.gqa import GQAttention
from msa_jax.attention.linear import GatedDeltaNet
from msa_jax.attention.mamba2 import Mamba2
from msa_jax.attention.mixer import Mixer, MixerOutput, Mode
from msa_jax.attention.mla import MLAttention
from msa_jax.attention.msa import MSAttention
from msa_jax.attention.pattern import PatternAttention
from msa_jax.config import AttentionConfig

__all__ = [
    "GQAttention",
    "GatedDeltaNet",
    "MLAttention",
    "MSAttention",
    "Mamba2",
    "Mixer",
    "MixerOutput",
    "Mode",
    "PatternAttention",
    "build_mixer",
]

# Those that keep a latent or a state instead of keys and values.
_LATENT_AND_RECURRENT = {"mla": MLAttention, "linear": GatedDeltaNet, "mamba2": Mamba2}


def build_mixer(
    config: AttentionConfig, d_model: int, *, computes_selection: bool, rngs: nnx.Rngs, **options
) -> Mixer:
    """The mixer that `config.kind` names; `options` as of the mixers' constructors."""
    if config.kind == "msa":
        options["computes_selection"] = computes_selection
        return MSAttention(config, d_model, rngs=rngs, **options)
    if config.kind in _LATENT_AND_RECURRENT:
        return _LATENT_AND_RECURRENT[config.kind](config, d_model, rngs=rngs, **options)
    if config.selects_blocks:
        return PatternAttention(config, d_model, rngs=rngs, **options)
    return GQAttention(config, d_model, rngs=rngs, **options)
