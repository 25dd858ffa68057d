"""Metrics of the cache."""

from prometheus_client import Counter, Gauge

RESIDENT = Gauge("loraplex_cache_resident_artifacts", "Artifacts in a tier.", ["tier"])
REGISTERED = Gauge("loraplex_cache_registered_adapters", "Adapters that are registered.")
ENGINES = Gauge("loraplex_cache_attached_engines", "Engines that are attached.")
REGISTRY_REACHABLE = Gauge("loraplex_cache_registry_reachable", "1 while Redis answers.")
FETCHES = Counter("loraplex_cache_fetches_total", "Adapters read from their source.", ["outcome"])
LOADS = Counter("loraplex_cache_loads_total", "Loads onto a device asked for.")
EVICTIONS = Counter("loraplex_cache_evictions_total", "Evictions from a tier.", ["tier"])
