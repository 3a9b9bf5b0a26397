"""Data, models, training loop and reports behind the ``localsgd`` command. The library half never imports this."""
