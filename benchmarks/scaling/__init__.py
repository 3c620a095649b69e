"""What more ranks cost: bytes and memory measured on real ones (traffic.py, memory.py), time computed (model.py)."""
