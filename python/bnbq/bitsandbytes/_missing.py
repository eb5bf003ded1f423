"""What bitsandbytes has and bnbq does not: the names are known, so that asking for one says why."""

OPTIMIZERS = (
    "8-bit and paged optimizers are outside bnbq. Use torch.optim or another library's; "
    "adapters on a quantised base are small enough for 32-bit states"
)
LIBRARY = "bitsandbytes finds and calls its own C library there; what runs in bnbq, and why, says `bnbq doctor`"


def reason_for(module: str, reasons: dict[str, str]):
    """A module's ``__getattr__``: AttributeError, with the reason if the name is one of bitsandbytes'.

    reasons: reason -> names, separated by spaces.
    """
    known = {name: reason for reason, names in reasons.items() for name in names.split()}

    def missing(name: str):
        message = f"module {module!r} has no attribute {name!r}"
        raise AttributeError(f"{message}: {known[name]}" if name in known else message)

    return missing
