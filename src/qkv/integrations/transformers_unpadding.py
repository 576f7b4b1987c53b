"""The former name of `qkv.integrations.transformers.unpadding`, until 0.1.0 is released."""

from qkv.integrations.transformers.unpadding import unpad as unpad
