"""The verbs of the `forgekit` command: what each takes, and the one public function that it calls."""
