"""What `python -m av_mae.benchmark` measures, and the plain formulation it is measured against."""
