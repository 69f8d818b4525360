"""`python -m dfkd_ray` and the `dfkd-ray` console command."""

from dfkd_ray.cli import main

if __name__ == "__main__":
    main()
