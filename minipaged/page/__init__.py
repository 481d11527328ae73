"""A recorded run as one HTML page: it plays in a browser, without a network. And the map of blocks that the server's page draws too."""
