"""The command line's half of the package: data, models, the training loop, and reports. The library never imports it."""
