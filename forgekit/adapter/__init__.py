"""What learns: low-rank matrices beside chosen layers, on either engine."""
