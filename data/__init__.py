"""Videos and actions in: readers, action files, dataset sources, token store, synthetic world."""
