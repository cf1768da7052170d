#!/bin/sh
# An arm64 userland with Python, NumPy and TVM, for tests/test_arm.py to run under qemu-aarch64.
#
#   PYTHON=.venv/bin/python tests/arm_sysroot.sh     half a gigabyte in .arm-sysroot
#   .venv/bin/python -m pytest -m slow tests/test_arm.py
#
# It takes Debian (or a derivative that has arm64) for the packages, pip for the wheels, and no rights but to write
# here. The packages qemu-user and binutils-aarch64-linux-gnu must be installed.
set -eu
folder=$(dirname "$0")/../.arm-sysroot
mkdir -p "$folder/apt/lists/partial" "$folder/apt/cache/archives/partial" "$folder/system" "$folder/wheels"
folder=$(cd "$folder" && pwd)
: > "$folder/apt/status"

apt() {
  apt-get -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$folder/apt" \
    -o Dir::State::lists="$folder/apt/lists" -o Dir::State::status="$folder/apt/status" \
    -o Dir::Cache="$folder/apt/cache" -o Debug::NoLocking=1 -o APT::Sandbox::User= \
    -o APT::Keep-Downloaded-Packages=1 -o DPkg::Post-Invoke= -o APT::Update::Post-Invoke= "$@"
}

apt update
apt install --yes --download-only --no-install-recommends python3 libstdc++6
for package in "$folder"/apt/cache/archives/*.deb; do
  dpkg-deb --extract "$package" "$folder/system"
done

version=$(basename "$(readlink "$folder/system/usr/bin/python3")")
"${PYTHON:-python3}" -m pip install --quiet --upgrade --target "$folder/wheels" --no-deps --only-binary=:all: \
  --python-version "${version#python}" --implementation cp --platform manylinux_2_28_aarch64 \
  --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
  'apache-tvm==0.27.0.post1' 'apache-tvm-ffi==0.1.14.post1' numpy ml_dtypes typing-extensions psutil tornado cloudpickle

cat > "$folder/python" <<END
#!/bin/sh
# Python for arm64, which finds this script again as sys.executable.
export PYTHONHOME="$folder/system/usr" PYTHONPATH="$folder/wheels"
exec "\${QEMU:-qemu-aarch64}" -L "$folder/system" -cpu "\${QEMU_CPU:-max}" -0 "\$0" "$folder/system/usr/bin/$version" "\$@"
END
chmod +x "$folder/python"
"$folder/python" -c 'import platform, sys; print("Python", sys.version.split()[0], "on", platform.machine())'
