"""kvarn: the place where the key-value cache of language models is managed."""

from .cache import Cache
from .engine import Engine, Sampling
from .episodes import Episodes
from .methods import METHODS, Method
from .models import load
from .plan import Plan
from .recipe import Recipe
from .report import Report

__all__ = ["METHODS", "Cache", "Engine", "Episodes", "Method", "Plan", "Recipe", "Report", "Sampling", "load"]
