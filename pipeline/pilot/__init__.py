"""`tamis pilot`: small trainings on a design of mixtures, and the forecasts made of them."""
