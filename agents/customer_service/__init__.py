"""Customer service: understands what a customer wants, and answers or hands over."""

from llmos.agents.customer_service.program import (
    CustomerService,
    CustomerServiceConfig,
    CustomerServiceState,
    Noted,
)

__all__ = ["CustomerService", "CustomerServiceConfig", "CustomerServiceState", "Noted"]
