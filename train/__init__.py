"""Masked views -> encoder: methods, the loop under torchrun, the evaluation of an encoder."""
