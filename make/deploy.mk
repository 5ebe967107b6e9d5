# Running a station: what the control machine does. Included by the Makefile.

CONTROL := $(LOCAL)/control
INVENTORY ?=
ANSIBLE_OPTIONS ?=
PLAYBOOK = ANSIBLE_CONFIG=ansible.cfg $(CONTROL)/bin/ansible-playbook -i '$(INVENTORY)' $(ANSIBLE_OPTIONS)
need_inventory = @test -n '$(INVENTORY)' || { echo 'which station? make $@ INVENTORY=inventory/lab (start from inventory/example)' >&2; exit 2; }

# With INVENTORY=… the scripts run on the station instead of here.
on_station = $(CONTROL)/bin/python make/on_station.py '$(INVENTORY)' $(subst _,-,$(1)) \
	$(call flag,VERBOSE,--verbose) $(call flag,JSON,--json)

##@ Run a station

.PHONY: setup
setup: $(CONTROL)/.done ## Install on this control machine what deploys stations

.PHONY: deploy
deploy: $(CONTROL)/.done ## Make INVENTORY=… a station, or bring it up to date (DRY_RUN=1: only say what would change)
	$(need_inventory)
	@$(PLAYBOOK) playbooks/site.yml $(call flag,DRY_RUN,--check --diff) $(ARGS)

.PHONY: check
check: $(CONTROL)/.done ## Is the station of INVENTORY=… healthy: one line a thing, one verdict
	$(need_inventory)
	@$(PLAYBOOK) playbooks/check.yml $(ARGS)

.PHONY: doctor
doctor: $(VENV)/.local ## Look at everything the scripts stand on (INVENTORY=…: on the station)
	@$(call run,doctor) $(ARGS)

.PHONY: uninstall
uninstall: $(CONTROL)/.done ## Take a station off its host (says first what that takes)
	$(need_inventory)
	@$(PLAYBOOK) playbooks/uninstall.yml $(ARGS)

$(CONTROL)/.done: requirements/control.txt $(VENV)/.uv
	@$(PYTHON) -m venv $(CONTROL)
	$(call install,$(CONTROL)/bin/python,requirements/control.txt)
	@touch $@

##@ Develop it

.PHONY: lint-deploy
lint-deploy: $(CONTROL)/.test $(VENV)/.test ## ansible-lint, yamllint and shellcheck on roles, playbooks and their scripts
	@PATH="$(CURDIR)/$(CONTROL)/bin:$$PATH" $(CONTROL)/bin/ansible-lint --offline -q
	@$(CONTROL)/bin/yamllint --strict .
	@$(VENV)/bin/shellcheck roles/label_studio/files/with-credentials
	@$(VENV)/bin/mypy make/on_station.py roles/alert/files/alert.py roles/base/files/pack.py \
		roles/label_studio/filter_plugins/networks.py roles/postgres/filter_plugins/scram.py

# MOLECULE=default|full, RELEASE=bookworm|trixie
MOLECULE ?= default
RELEASE ?= bookworm

.PHONY: molecule
molecule: $(CONTROL)/.test $(VENV)/.test ## Deploy to a real Debian in systemd-nspawn and use it (root; RELEASE=bookworm|trixie MOLECULE=default|full)
	@PATH="$(CURDIR)/$(CONTROL)/bin:$$PATH" RELEASE=$(RELEASE) ANSIBLE_CONFIG=$(CURDIR)/ansible.cfg \
		MOLECULE_GLOB='tests/molecule/*/molecule.yml' molecule test --scenario-name $(MOLECULE) $(ARGS)

.PHONY: molecule-packages
molecule-packages: ## Install the Debian packages that `make molecule` needs (root)
	@apt-get -qq update
	@DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends -o DPkg::Lock::Timeout=600 \
		mmdebstrap systemd-container slirp4netns debian-archive-keyring iproute2 openssh-client rsync \
		chromium fonts-noto-core

$(CONTROL)/.test: requirements/control_test.txt $(CONTROL)/.done
	$(call install,$(CONTROL)/bin/python,requirements/control_test.txt)
	@touch $@
