"""Numbers as people read them. Free of torch."""

from __future__ import annotations


def compact(value: float) -> str:
    """1500 → 1,500; 20000 → 20k; 1500000 → 1.5M; four digits of the rest."""
    for size, unit, scale in ((1e12, "T", 1e12), (1e9, "B", 1e9), (1e6, "M", 1e6), (1e4, "k", 1e3)):
        if abs(value) >= size:
            return f"{value / scale:.4g}{unit}"
    return f"{value:,.10g}" if float(value).is_integer() else f"{value:.4g}"


def duration(seconds: float) -> str:
    """4.26 → 4.3 s; 75 → 1 min 15 s; 9000 → 2 h 30 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3_600 else f"{whole // 3_600:,} h {whole % 3_600 // 60} min"


def byte_size(size: float) -> str:
    """MiB up to 128 of them, then GiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.1f} MiB"


def flop_rate(rate: float) -> str:
    """FLOP/s as TFLOP/s, or GFLOP/s below one of them."""
    return f"{rate / 1e12:,.4g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.3g} GFLOP/s"
