"""What the services share at their rim: errors and statuses, settings, server life cycle, traces, metrics."""
