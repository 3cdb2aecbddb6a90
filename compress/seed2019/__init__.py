"""What the research code of Molchanov et al. 2019 wrote: its settings and its checkpoints."""
