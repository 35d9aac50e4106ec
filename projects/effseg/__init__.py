"""EffSeg: fine-grained instance segmentation on structure-preserving sparsity (Picron and Tuytelaars 2023)."""
