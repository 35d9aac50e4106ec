"""FLOP formulas of the operators, for fvcore and for ``torch.utils.flop_counter``."""


def fvcore_handles():
    return {}


def flop_formulas():
    return {}
