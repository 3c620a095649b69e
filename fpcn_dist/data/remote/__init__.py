"""Object stores: folders are listed, objects are fetched ahead and kept in a bounded cache of this machine."""
