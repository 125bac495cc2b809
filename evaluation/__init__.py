"""Open any checkpoint; measure and draw what its encoder knows."""
