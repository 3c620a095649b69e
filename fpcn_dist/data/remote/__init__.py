"""Object stores: folders are listed, objects fetched ahead of their use, and kept in a bounded cache of this machine."""
