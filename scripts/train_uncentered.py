"""The trainer without centring, which collapses by design: an experiment for ``scripts.choose_iteration``.

Takes the trainer's command line. With ``train.centering=centering`` the centre of the targets stays zero.
"""

from dinov2 import cli
from dinov2.loss.centering import CenteredLoss
from dinov2.train.arguments import get_args_parser
from dinov2.train.train import main

if __name__ == "__main__":
    CenteredLoss.apply_center_update = CenteredLoss.discard_center_update
    cli.run(main, get_args_parser().parse_args())
