"""Finance: weighs a case by rules and backs the outcome with the policy."""

from llmos.agents.finance.messages import RiskCase
from llmos.agents.finance.program import Finance, FinanceConfig, FinanceState

__all__ = ["Finance", "FinanceConfig", "FinanceState", "RiskCase"]
