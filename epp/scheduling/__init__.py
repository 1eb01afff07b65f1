"""Where should a request run? Profiles of filters, scorers and a picker over the endpoint table. Pure."""
