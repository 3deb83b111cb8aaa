"""Drivers hide what is underneath: devices, engines, models, stores and indexes."""
