"""JupyterLab's job form and its REST API as another way to say `forgekit run`: the extra `jobs`."""
