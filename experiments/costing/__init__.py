"""What `experiments.economics` is made of: measured rates in, tables, curves and pages out."""
